"""The parts of the sign-up application that service and worker share: its task, and the code in its link."""
