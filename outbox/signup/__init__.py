"""What only the sign-up application knows and its service and worker share: its task, and the code in its link."""
