"""What turns pixels, text and boxes into ids and back."""
