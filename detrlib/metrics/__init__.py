"""What is measured: detection quality, how sparse attention is, and where it lies. One file per question."""
