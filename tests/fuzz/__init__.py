"""Coverage-guided fuzzing, of the library and of the Python side."""
