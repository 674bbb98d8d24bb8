"""What happens in an epoch? Setup, the loop, one optimizer step."""
