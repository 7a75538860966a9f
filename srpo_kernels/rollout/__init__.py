"""What happens around the loss in a training step."""
