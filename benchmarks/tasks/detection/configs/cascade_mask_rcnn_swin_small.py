# Cascade Mask R-CNN with Swin-S, else as with Swin-T: box AP 51.9, mask AP 45.0.
_base_ = "./cascade_mask_rcnn_swin_tiny.py"

model = dict(backbone=dict(depths=[2, 2, 18, 2]))
