"""The study: everything that people at the sites approve, and nothing else.

One TOML file holds the task, the model, how images are prepared, how a site trains, the privacy
plan, the secure sum and the members. Its digest is what a site approves and what every run names.
"""

from common.study.model import (
    AttentionUnet,
    CenterUnet,
    Cnn,
    DenseNet121,
    EfficientNetB0,
    Logistic,
    Mlp,
    Model,
    Multimodal,
    ResNet18,
    SegResNet,
    Unet,
)
from common.study.privacy import DifferentialPrivacy, Engine, NoPrivacy, Privacy
from common.study.statistics import Statistics
from common.study.study import MIN_SITES, Deadlines, Member, Name, Study
from common.study.table import CategoryColumn, Column, DateColumn, NumberColumn, Table
from common.study.task import Classification, Detection, Segmentation
from common.study.training import (
    Augmentation,
    Count,
    FedAdagrad,
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
    "CategoryColumn",
    "CenterUnet",
    "Classification",
    "Cnn",
    "Column",
    "Count",
    "DateColumn",
    "Deadlines",
    "DenseNet121",
    "Detection",
    "DifferentialPrivacy",
    "EfficientNetB0",
    "Engine",
    "FedAdagrad",
    "FedAdaptive",
    "FedAvg",
    "FedAvgM",
    "Input",
    "Logistic",
    "Member",
    "Mlp",
    "Model",
    "Multimodal",
    "Name",
    "NoPrivacy",
    "NumberColumn",
    "Positive",
    "Privacy",
    "ResNet18",
    "SegResNet",
    "Segmentation",
    "ServerOptimizer",
    "Statistics",
    "Study",
    "Table",
    "Training",
    "TrainingLoss",
    "Unet",
]
