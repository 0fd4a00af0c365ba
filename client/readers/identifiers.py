"""Which header fields say who a person is: named, counted, and taken out of a copy; never shown.

Source: DICOM PS3.15, table E.1-1, basic profile: the fields that files from scanners really fill.
"""

from __future__ import annotations

from pydicom import Dataset

PERSON = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientBirthTime",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "PatientMotherBirthName",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientComments",
    "AdditionalPatientHistory",
    "MilitaryRank",
    "EthnicGroup",
    "Occupation",
    "AccessionNumber",
    "StudyID",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "PhysiciansOfRecord",
    "OperatorsName",
    "RequestingPhysician",
    "InstitutionName",
    "InstitutionAddress",
    "InstitutionalDepartmentName",
    "StationName",
    "DeviceSerialNumber",
    "StudyDescription",
    "SeriesDescription",
    "ImageComments",
    "ProtocolName",
    "RequestAttributesSequence",
    "OriginalAttributesSequence",
)
DATES = (
    "StudyDate",
    "SeriesDate",
    "AcquisitionDate",
    "ContentDate",
    "AcquisitionDateTime",
    "StudyTime",
    "SeriesTime",
    "AcquisitionTime",
    "ContentTime",
)
BURNED_IN = "BurnedInAnnotation"
NO_PATIENT = "de-identified"


def identifiers_in(header: Dataset) -> list[str]:
    """Names of the fields that hold something about the person."""
    found = [name for name in (*PERSON, *DATES) if header.get(name)]
    if header.get("PatientIdentityRemoved") == "YES":  # then an id is a pseudonym
        found = [name for name in found if name != "PatientID"]
    if any(element.tag.is_private for element in header):
        found.append("private fields")
    if header.get(BURNED_IN) == "YES":
        found.append(BURNED_IN)
    return found
