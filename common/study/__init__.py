"""The study: everything that people at the sites approve, and nothing else.

One TOML file holds the task, the model, how images are prepared, how a site trains, the privacy
plan, the secure sum and the members. Its digest is what a site approves and what every run names.
"""

from common.study.model import (
    AttentionUnet,
    Cnn,
    DenseNet121,
    EfficientNetB0,
    Model,
    ResNet18,
    Unet,
)
from common.study.privacy import DifferentialPrivacy, Engine, NoPrivacy, Privacy
from common.study.study import MIN_SITES, Deadlines, Member, Name, Study
from common.study.task import Classification, Segmentation
from common.study.training import (
    Augmentation,
    Count,
    FedAdaptive,
    FedAvg,
    FedAvgM,
    Input,
    Positive,
    ServerOptimizer,
    Training,
    TrainingLoss,
)

__all__ = [
    "MIN_SITES",
    "AttentionUnet",
    "Augmentation",
    "Classification",
    "Cnn",
    "Count",
    "Deadlines",
    "DenseNet121",
    "DifferentialPrivacy",
    "EfficientNetB0",
    "Engine",
    "FedAdaptive",
    "FedAvg",
    "FedAvgM",
    "Input",
    "Member",
    "Model",
    "Name",
    "NoPrivacy",
    "Positive",
    "Privacy",
    "ResNet18",
    "Segmentation",
    "ServerOptimizer",
    "Study",
    "Training",
    "TrainingLoss",
    "Unet",
]
