"""Detection and instance segmentation with MMDetection."""
