"""Faces: detect (MTCNN), align (five points), embed (SFace, ArcFace, FaceNet), compare (identity reward)."""

from .alignment import ARCFACE_TEMPLATE, align_faces, similarity_transform
from .detections import Detections, FaceDetector, LargestFaces, quantize_frames, upscale_frames
from .embedders import ArcFaceEmbedder, FaceEmbedder, FacenetEmbedder, SFaceEmbedder, load_embedder
from .identity import FaceIdentity, IdentityScore, MissingFace, ReferenceFaces, identity_score
from .mtcnn import (
    MTCNN_INPUT_SIZES,
    MTCNN_OUTPUTS,
    BatchedMTCNN,
    MTCNNNetwork,
    Network,
    as_network,
    load_mtcnn_networks,
)
from .onnx_module import OnnxModule

__all__ = [
    "ARCFACE_TEMPLATE",
    "MTCNN_INPUT_SIZES",
    "MTCNN_OUTPUTS",
    "ArcFaceEmbedder",
    "BatchedMTCNN",
    "Detections",
    "FaceDetector",
    "FaceEmbedder",
    "FaceIdentity",
    "FacenetEmbedder",
    "IdentityScore",
    "LargestFaces",
    "MTCNNNetwork",
    "MissingFace",
    "Network",
    "OnnxModule",
    "ReferenceFaces",
    "SFaceEmbedder",
    "align_faces",
    "as_network",
    "identity_score",
    "load_embedder",
    "load_mtcnn_networks",
    "quantize_frames",
    "similarity_transform",
    "upscale_frames",
]
