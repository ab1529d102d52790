"""Zero-shot instance segmentation with Segment Anything."""
