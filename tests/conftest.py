"""Everything heavy is imported once here, so that forked ranks start warm."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests with and without a GPU; before torch looks for one

import torch

torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # its first call imports 519 modules
torch.set_num_threads(1)  # a parent that has used OpenMP's threads forks ranks that wait for them for ever
