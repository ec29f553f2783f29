"""A data set beside the script that uses it, as in pytorch/examples, distributed/ddp-tutorial-series/datautils.py."""

import torch
from torch.utils.data import Dataset


class PointsDataset(Dataset):
    """Random points and the class of each."""

    def __init__(self, size):
        generator = torch.Generator().manual_seed(0)
        self.points = torch.rand(size, 20, generator=generator)
        self.classes = torch.randint(4, (size,), generator=generator)

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        return self.points[index], self.classes[index]
