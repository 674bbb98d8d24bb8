"""What is in the thoughts of a trained model? Readings, next steps in ProsQA's graphs, interventions."""
