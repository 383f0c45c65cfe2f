"""M4oE: multi-organ and lesion segmentation of CT and MR by a Swin-UNet with a mixture of modality experts."""

__version__ = "0.1.0"
