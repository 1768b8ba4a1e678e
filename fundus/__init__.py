"""What is known about photographs of the retina, without torch."""
