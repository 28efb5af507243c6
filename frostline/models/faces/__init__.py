"""Faces: detect (MTCNN, YuNet, SCRFD), align (five points), embed (SFace, ArcFace, FaceNet, dlib), compare."""

from frostline.models.onnx.module import OnnxGraph, OnnxModule

from .alignment import ARCFACE_TEMPLATE, align_faces, similarity_transform
from .detections import ChosenFaces, Detections, FaceDetector, quantize_frames, resize_frames, upscale_frames
from .detectors import DetectorModel, DetectorNetwork, load_detector
from .dlib_embedder import DlibEmbedder
from .embedders import ArcFaceEmbedder, FaceEmbedder, FacenetEmbedder, SFaceEmbedder, load_embedder
from .identity import FaceIdentity, IdentityScore, MissingFace, ReferenceFaces, identity_score
from .mtcnn import BatchedMTCNN
from .mtcnn_networks import MTCNN_INPUT_SIZES, MTCNN_OUTPUTS, load_mtcnn_networks
from .networks import Network, as_network
from .scrfd import Scrfd, ScrfdNetwork
from .yunet import YuNet, YuNetNetwork

__all__ = [
    "ARCFACE_TEMPLATE",
    "MTCNN_INPUT_SIZES",
    "MTCNN_OUTPUTS",
    "ArcFaceEmbedder",
    "BatchedMTCNN",
    "ChosenFaces",
    "Detections",
    "DetectorModel",
    "DetectorNetwork",
    "DlibEmbedder",
    "FaceDetector",
    "FaceEmbedder",
    "FaceIdentity",
    "FacenetEmbedder",
    "IdentityScore",
    "MissingFace",
    "Network",
    "OnnxGraph",
    "OnnxModule",
    "ReferenceFaces",
    "SFaceEmbedder",
    "Scrfd",
    "ScrfdNetwork",
    "YuNet",
    "YuNetNetwork",
    "align_faces",
    "as_network",
    "identity_score",
    "load_detector",
    "load_embedder",
    "load_mtcnn_networks",
    "quantize_frames",
    "resize_frames",
    "similarity_transform",
    "upscale_frames",
]
