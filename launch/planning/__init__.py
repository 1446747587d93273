"""What a step needs: bytes by strategy, and seconds from measured kernels and steps."""
