"""What the tests and the reports in scripts/reports share."""
