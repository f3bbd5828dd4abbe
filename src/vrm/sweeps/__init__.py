"""Many runs: which ones a line of settings describes, and where they train."""
