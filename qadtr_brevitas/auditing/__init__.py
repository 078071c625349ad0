"""The audit that tells a defense from a mirage: checks G1 to G19, each with its numbers and what they mean."""

from qadtr_brevitas.auditing.finding import AuditReport as AuditReport
from qadtr_brevitas.auditing.finding import Finding as Finding
from qadtr_brevitas.auditing.finding import PrecisionAudit as PrecisionAudit
from qadtr_brevitas.auditing.run import audit as audit
