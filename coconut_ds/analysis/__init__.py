"""What came of it? Comparisons, reports, what is inside the thoughts."""
