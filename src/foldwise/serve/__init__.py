"""A kept run or a blend, asked about pictures: by a command, a page, a webcam, a request or an exported file.

Whatever a stranger may have sent is read by `pictures` alone; whatever answers goes through `predictor`.
"""
