"""The parts of a report: what is read, what is said, what is drawn."""
