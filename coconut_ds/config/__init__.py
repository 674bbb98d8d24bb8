"""What can I set? The run file, the methods, the DeepSpeed file."""
