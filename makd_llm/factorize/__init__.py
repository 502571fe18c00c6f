"""Building the student: statistics of the teacher's inputs, decompositions, ranks."""
