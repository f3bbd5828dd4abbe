"""Many runs: which ones a line with lists describes, and where they train."""
