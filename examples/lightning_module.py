"""F²C in a LightningModule: python examples/lightning_module.py --data data/example --devices 2"""

import argparse
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader

from f2c_plugin import DualSampler, Margin, RecordDataset, VerificationSet, build_head
from f2c_plugin.models import get_model
from f2c_plugin.synthetic.dataset import write_dataset


class FaceModule(LightningModule):
    def __init__(self, data: Path, epochs: int, seed: int):
        super().__init__()
        self.net, self.dataset, self.epochs, self.seed = get_model("tiny", 64), RecordDataset(data), epochs, seed

    def setup(self, stage):  # the process group exists; DDP and the states of a checkpoint come after
        labels = self.dataset.index.identity
        self.sampler = DualSampler.from_labels(labels, batch_size=64 // self.trainer.world_size, seed=self.seed)
        self.total_steps = self.epochs * len(self.sampler)
        # A submodule, so that it is moved to the device and saved. DDP has nothing to reduce: no parameter takes gradient.
        self.head = build_head(self.net, int(labels.max()) + 1, self.total_steps, embedding_size=64,
                               margin=Margin(32.0, additive=0.35), pool_rate=0.7)

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_sampler=self.sampler)

    def on_train_epoch_start(self):
        self.sampler.set_epoch(self.current_epoch)  # Lightning does not find it, and a resumed training needs it

    def training_step(self, batch, index):
        images, identities = batch
        return self.head(self.net(images), identities)

    def configure_optimizers(self):
        optimizer = SGD(self.net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        schedule = lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.total_steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder of a pack; synthetic faces are drawn if it is missing")
    for name, default in ("--epochs", 4), ("--devices", 1), ("--seed", 0):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    if not args.data.exists():
        write_dataset(args.data, num_identities=100, images_per_identity=20, num_pairs=1000)
    seed_everything(args.seed)
    trainer = Trainer(
        accelerator="cpu", devices=args.devices, max_epochs=args.epochs, gradient_clip_val=5, logger=False,
        enable_checkpointing=False, use_distributed_sampler=False,  # every rank's sampler picks batches for that rank
        strategy=DDPStrategy(broadcast_buffers=False) if args.devices > 1 else "auto")  # every rank has its own slots
    trainer.fit(module := FaceModule(args.data, args.epochs, args.seed))
    if trainer.is_global_zero:
        print(f"accuracy {VerificationSet(args.data / 'synth.bin').evaluate(module.net).accuracy:.4f}")
