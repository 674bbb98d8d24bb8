"""What is inside the thoughts of a trained model: readings, next steps in ProsQA's graphs, interventions."""
