"""The data sets that jetflow knows: one TFDS builder each, found by name in `BUILDERS`."""

from jetflow.data.builders.afhq import Afhq, AfhqV2
from jetflow.data.builders.cifar10 import Cifar10
from jetflow.data.builders.digits import Digits
from jetflow.data.builders.folder import Folder
from jetflow.data.builders.imagenet import ImageNet1k, ImageNet21k, ImageNet21kFall11
from jetflow.data.builders.imagenet_small import (
    ImageNet32New,
    ImageNet32Old,
    ImageNet64New,
    ImageNet64Old,
)
from jetflow.data.builders.photos import Photos
from jetflow.data.builders.shapes import Shapes

# A builder with configs is named together with one of them: "photos/16".
BUILDERS = {
    each.name: each
    for each in (
        Digits, Photos, Shapes, Cifar10, ImageNet32Old, ImageNet64Old, ImageNet32New, ImageNet64New,
        ImageNet1k, ImageNet21k, ImageNet21kFall11, Afhq, AfhqV2, Folder,
    )
}  # fmt: skip
