"""How is a trained model asked?"""
