"""Training of one transducer in one experiment directory, from which an interrupted run resumes exactly.

The modules, in the order in which a newcomer reads them:

    trainer          runs the loop: epochs, batches, steps
    state            holds what training changes: model, optimiser, running mean, progress
    objective        computes the loss that training minimises
    guard            skips and records batches without a finite loss, and gives up on runs that learn no more
    validation       computes the loss on the validation cuts
    largest_batch    finds out at the start whether the largest batch fits into memory
    training_log     writes to TensorBoard and to the progress bar
    resume           saves and loads checkpoints, and decides whether a run can go on from one
    experiment_dir   finds, checks and sets aside the files of a run
    averaging        keeps the running mean of the weights, and averages epochs
    optim, lr        ScaledAdam and the Eden learning-rate schedule
    weight_noise     adds noise to weights
    distributed      connects several processes
    stopping         stops a run by a signal
    graphs           captures passes as CUDA graphs
"""


class TrainingError(ValueError):
    """Training cannot go on. The message is one line that says why, and what to do."""
