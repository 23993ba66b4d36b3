"""What a training will cost before it runs: memory, bytes, hours, and which of them is the limit."""
