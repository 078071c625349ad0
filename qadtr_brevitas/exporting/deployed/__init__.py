"""What is copied into the folder of every export."""
