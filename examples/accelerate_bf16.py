"""F²C with Hugging Face Accelerate, in bfloat16: python examples/accelerate_bf16.py --data data/example"""

import argparse
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import SGD, lr_scheduler
from torch.utils.data import DataLoader

from f2c_plugin import DualSampler, Margin, RecordDataset, VerificationSet, build_head
from f2c_plugin.models import get_model
from f2c_plugin.synthetic.dataset import write_dataset


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder of a pack; synthetic faces are drawn if it is missing")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.data.exists():
        write_dataset(args.data, num_identities=100, images_per_identity=20, num_pairs=1000)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    set_seed(args.seed)  # the same on all ranks

    dataset = RecordDataset(args.data)
    labels = dataset.index.identity
    # Every rank's sampler picks batches for that rank. Do not prepare the loader: Accelerate would split them again.
    sampler = DualSampler.from_labels(labels, 64 // accelerator.num_processes, seed=args.seed)
    loader = DataLoader(dataset, batch_sampler=sampler)
    total_steps = args.epochs * len(loader)
    net = get_model("tiny", 64, fp16=True).to(accelerator.device)  # fp16: the convolutions run in the autocast type
    # Before prepare, which replaces net.forward. With autocast=True, products with the pool run in bfloat16, too.
    head = build_head(net, int(labels.max()) + 1, total_steps, embedding_size=64, margin=Margin(32.0, additive=0.35),
                      pool_rate=0.7, autocast=True)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_steps)
    net, optimizer = accelerator.prepare(net, optimizer)

    for _ in range(args.epochs):
        for images, identities in loader:
            images, identities = images.to(accelerator.device), identities.to(accelerator.device)
            with accelerator.autocast():
                loss = head(net(images), identities)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(net.parameters(), 5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    if accelerator.is_main_process:
        accuracy = VerificationSet(args.data / "synth.bin").evaluate(accelerator.unwrap_model(net)).accuracy
        print(f"accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
