"""What happens around a step: console line, metrics file, TensorBoard, checkpoints. One small file each."""
