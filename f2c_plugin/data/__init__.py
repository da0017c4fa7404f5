"""Face packs: RecordIO reader and writer, identity index, dual sampler and dual loader."""

from f2c_plugin.data.dataset import RecordDataset
from f2c_plugin.data.identities import IdentityIndex
from f2c_plugin.data.loader import DualLoader
from f2c_plugin.data.recordio import RecordFile, unpack_image_record
from f2c_plugin.data.sampler import DualSampler
from f2c_plugin.data.writer import RecordWriter, pack_image_record

__all__ = ["DualLoader", "DualSampler", "IdentityIndex", "RecordDataset", "RecordFile", "RecordWriter",
           "pack_image_record", "unpack_image_record"]
