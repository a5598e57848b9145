"""The colours of every picture: the palette of Okabe and Ito, and a grey.

The palette can be told apart with every kind of colour vision.
"""

BLACK = "#000000"
BLUE = "#0072B2"
GREEN = "#009E73"
GREY = "#999999"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
VERMILION = "#D55E00"
YELLOW = "#F0E442"
