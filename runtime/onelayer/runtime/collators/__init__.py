"""The wing that makes batches for trainers of rows that hold more than text."""
