# Cascade Mask R-CNN with the bundled Swin: heads as the Swin authors', a quarter as wide.
_base_ = "./mask_rcnn_bundled_swin.py"

stages = [
    dict(stds=[0.1, 0.1, 0.2, 0.2], iou=0.5),
    dict(stds=[0.05, 0.05, 0.1, 0.1], iou=0.6),
    dict(stds=[0.033, 0.033, 0.067, 0.067], iou=0.7),
]
model = dict(
    type="CascadeRCNN",
    roi_head=dict(
        type="CascadeRoIHead",
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=[
            dict(
                type="ConvFCBBoxHead",
                num_shared_convs=4,
                num_shared_fcs=1,
                in_channels=64,
                conv_out_channels=64,
                fc_out_channels=128,
                roi_feat_size=7,
                num_classes={{_base_.classes}},
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=stage["stds"]),
                reg_class_agnostic=False,
                reg_decoded_bbox=True,
                norm_cfg=dict(type="BN"),
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
            )
            for stage in stages
        ],
    ),
    train_cfg=dict(
        rcnn=[
            dict(
                assigner=dict(
                    type="MaxIoUAssigner",
                    pos_iou_thr=stage["iou"],
                    neg_iou_thr=stage["iou"],
                    min_pos_iou=stage["iou"],
                    match_low_quality=False,
                    ignore_iof_thr=-1,
                ),
                sampler=dict(type="RandomSampler", num=16, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=True),
                mask_size=28,
                pos_weight=-1,
                debug=False,
            )
            for stage in stages
        ]
    ),
)
