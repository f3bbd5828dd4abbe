"""What is checked before a run trains, and in the folder of one that did."""
