"""What does a run leave, and what does a person see of it? The run folder and the terminal."""
