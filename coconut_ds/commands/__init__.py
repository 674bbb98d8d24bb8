"""What can I type? One module per command."""
