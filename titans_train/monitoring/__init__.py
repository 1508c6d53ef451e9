"""What a run tells: metrics.jsonl and TensorBoard, the console, throughput and memory, the loss picture."""
