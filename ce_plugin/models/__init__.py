"""Networks to explain, each with its input size, normalisation and class names."""

from ce_plugin.models.adaptation import Adaptation, DannCNN, GradientReversal, pseudo_labels, train_adapted
from ce_plugin.models.cifar import CifarResNet, PlainResNet, cifar_resnet, load_robust, small_cnn
from ce_plugin.models.digits import DigitsCNN, MnistCNN, mnist_cnn
from ce_plugin.models.fashion import FashionCNN
from ce_plugin.models.gan import GAN, Discriminator, Generator, train_gan
from ce_plugin.models.imagenet import efficientnet_lite0, imagenet_classes
from ce_plugin.models.mobilenet import MobileNet, load_bird_mobilenet, load_mobilenet
from ce_plugin.models.training import train_classifier
from ce_plugin.models.vision import (
    Framing,
    VisionModel,
    as_batch,
    load_model,
    load_state,
    load_weights,
    read_weights,
)
from ce_plugin.models.xrays import PneumoniaCNN, chexnet, pneumonia_cnn

__all__ = [
    "GAN",
    "Adaptation",
    "CifarResNet",
    "DannCNN",
    "DigitsCNN",
    "Discriminator",
    "FashionCNN",
    "Framing",
    "Generator",
    "GradientReversal",
    "MnistCNN",
    "MobileNet",
    "PlainResNet",
    "PneumoniaCNN",
    "VisionModel",
    "as_batch",
    "chexnet",
    "cifar_resnet",
    "efficientnet_lite0",
    "imagenet_classes",
    "load_bird_mobilenet",
    "load_mobilenet",
    "load_model",
    "load_robust",
    "load_state",
    "load_weights",
    "mnist_cnn",
    "pneumonia_cnn",
    "pseudo_labels",
    "read_weights",
    "small_cnn",
    "train_adapted",
    "train_classifier",
    "train_gan",
]
