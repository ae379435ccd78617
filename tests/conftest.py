"""Everything heavy is imported once here, so that forked ranks start warm."""

import os
import signal

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests with and without a GPU; before torch looks for one

import torch

torch.testing.assert_close(torch.zeros(1), torch.zeros(1))  # its first call imports 519 modules
torch.set_num_threads(1)  # a parent that has used OpenMP's threads forks ranks that wait for them for ever
# Started in the background, as by a script with &, it would ignore Ctrl-C and so would what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
