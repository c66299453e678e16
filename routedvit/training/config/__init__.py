"""The run config: its sections, how a file is read, and DeepSpeed's own keys."""
