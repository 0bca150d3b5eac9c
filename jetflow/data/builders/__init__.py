"""The data sets that jetflow knows: one TFDS builder each, found by name in `BUILDERS`."""

from jetflow.data.builders.digits import Digits
from jetflow.data.builders.photos import Photos

# A builder with configs is named together with one of them: "photos/16".
BUILDERS = {"digits": Digits, "photos": Photos}
