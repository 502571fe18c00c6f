"""What the student is to learn from the teacher, at three levels: matrices, layers, output."""
