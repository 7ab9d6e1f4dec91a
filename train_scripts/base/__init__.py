"""The parts of train_base.py: pictures, the models and their layout, the two training loops, the export."""
