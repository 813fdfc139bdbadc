"""What an image is and holds."""

from nbdvde.admin.calls import Call, OfImage
from nbdvde.engine.image import Image
from nbdvde.engine.report import ImageInfo


async def info(image: Image, _: OfImage) -> ImageInfo:
    """The image, its disks and statistics."""
    return image.info()


INFO = Call("info", OfImage, ImageInfo, info, changes=False)
