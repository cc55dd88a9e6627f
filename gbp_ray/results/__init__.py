"""What is kept of trials: written whole or not at all, read without torch or Ray."""
